"""What measures mpjax beside other libraries."""

"""Images with boxes: digits on a canvas, Pascal VOC and COCO."""

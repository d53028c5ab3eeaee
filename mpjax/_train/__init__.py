"""What the train step is made of: gradients, and the update of the state."""

"""Class labels in, images out."""

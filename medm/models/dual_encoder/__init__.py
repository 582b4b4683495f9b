"""Dual encoders: an image and a text become vectors in one space, whose products are scores."""

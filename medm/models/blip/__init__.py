"""BLIP: contrast, matching, report generation and labels by one image and one text encoder."""

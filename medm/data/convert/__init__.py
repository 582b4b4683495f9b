"""Conversion of files of one's own into records: tables, folders, DICOM, rows of other programs."""

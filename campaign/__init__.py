"""The fault campaign: damaged files, kills, stops and hostile content, with one table of outcomes.

One part, one file in `campaign/parts`, one line in `campaign.parts.PARTS`. docs/campaign.md explains
how to run it and how to read the table.
"""

"""A record to turns, with media bound to tags, boxes in the family's form, and the chat template."""

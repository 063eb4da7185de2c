"""Records to turns: media bound to tags, boxes in the family's form, and the chat template."""

"""Scores of answers: text, choices, boxes, JSON, captions, with bootstrap intervals."""

"""Parts of the HTML pages that training and tools write: the style, tables, curves, and images inside the page."""

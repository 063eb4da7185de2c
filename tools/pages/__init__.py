"""Parts of the HTML pages that tools write: the style, and pictures that lie in the page."""

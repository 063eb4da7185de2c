"""The demo: report of a short training on drawn images."""

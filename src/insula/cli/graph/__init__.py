"""Drawings of a tenant's networks: `topology` collects what is drawn, `text` and `svg` draw it."""

"""Stored objects for tests, with defaults for all required fields."""

from __future__ import annotations

from typing import Any

from insula.model.objects import ImageConfig, Instance, InstanceSpec, OverlayRoot


def instance(**fields: Any) -> Instance:
    """An instance `web` of tenant `acme` that is to run, with `fields` of its own."""
    defaults: dict[str, Any] = {
        "tenant": "acme",
        "name": "web",
        "id": "0" * 32,
        "host": "here",
        "spec": InstanceSpec(image="x"),
        "image_digest": "sha256:0",
        "config": ImageConfig(),
        "root": OverlayRoot(layers=[]),
        "wanted": "running",
        "created": 0.0,
    }
    return Instance(**{**defaults, **fields})

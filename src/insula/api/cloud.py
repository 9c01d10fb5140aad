"""What the API needs of `insula.control.cloud.Cloud`."""

from __future__ import annotations

from typing import Any, TypeAlias

Cloud: TypeAlias = Any

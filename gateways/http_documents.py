"""What the HTTP gateway says of itself: the OpenAPI document, and a page that shows it, with nothing from elsewhere.

The page is one file with one style and one script. Its policy lets the browser run these two and no other, and talk to
this server alone: whatever a document, a model's name or an answer may hold, none of it can become a program.
"""

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

OPENAPI = (files("narsil_stream.schemas") / "openapi.json").read_bytes()
PAGE = (files("narsil_stream.gateways") / "docs.html").read_bytes()


def _hash(tag: str) -> str:
    """Of what stands in the page's only element of that name, as policies write it."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), PAGE, re.DOTALL)
    return f"'sha256-{b64encode(sha256(inside).digest()).decode()}'"


POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hash('script')}",
        f"style-src {_hash('style')}",
        "img-src data:",  # the icon, which is empty
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
FRESH = ("cache-control", "no-cache")
"""Another version may run here tomorrow."""
NO_SNIFFING = ("x-content-type-options", "nosniff")

OPENAPI_HEADERS = [("content-type", "application/json"), FRESH, NO_SNIFFING]
PAGE_HEADERS = [
    ("content-type", "text/html; charset=utf-8"),
    ("content-security-policy", POLICY),
    ("cross-origin-opener-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
    FRESH,
    NO_SNIFFING,
]

"""Routes of the dashboard's files. They need no key: the pages send the user's key to the API."""

from fastapi import APIRouter, Request, Response

from app.dashboard.assets import Asset, load
from app.errors import NotFound

router = APIRouter(include_in_schema=False)

ONE_YEAR = "public, max-age=31536000, immutable"
# The page loads from this server only, and runs no inline scripts or styles.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "font-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "vary": "accept-encoding",
}


@router.api_route("/", methods=["GET", "HEAD"])
def get_page(request: Request) -> Response:
    """Returns the page of the dashboard. Browsers check at each visit whether it has changed."""
    return _answer(request, load().page, "no-cache")


@router.api_route("/dashboard/{version}/{path:path}", methods=["GET", "HEAD"])
def get_asset(version: str, path: str, request: Request) -> Response:
    """Returns a file of the dashboard, which browsers may keep."""
    dashboard = load()
    if version != dashboard.version or path not in dashboard.files:
        raise NotFound(
            "the dashboard has no such file; after an upgrade of the service, reload the page",
            "unknown_url",
        )
    return _answer(request, dashboard.files[path], ONE_YEAR)


def _answer(request: Request, asset: Asset, cache_control: str) -> Response:
    headers = {**HEADERS, "etag": asset.etag, "cache-control": cache_control}
    if asset.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    content = asset.content
    if "gzip" in request.headers.get("accept-encoding", ""):
        content, headers["content-encoding"] = asset.zipped, "gzip"
    return Response(content, headers=headers, media_type=asset.media_type)

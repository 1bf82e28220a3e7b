"""Routes of the dashboard: its files, and the state of the workers that it shows."""

from fastapi import APIRouter

from app.api.dashboard import pages, workers

router = APIRouter()
for _module in (pages, workers):
    router.include_router(_module.router)

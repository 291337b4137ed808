"""A FastAPI application whose records have a history."""

"""Run it with `uvicorn examples.fastapi_app.app:app`, then look at http://127.0.0.1:8000/docs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from datetime import datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from chrononaut import StaleVersionError, rationale
from examples.fastapi_app.database import Base, Document, engine, get_session, request_info


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:  # a real application migrates instead
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


async def current_user(request: Request, x_user: Annotated[str, Header()]) -> str:
    """Authenticate, and tell chrononaut. A real application reads a token here.

    It is a coroutine on purpose: a plain function would run in a thread, whose context ends with it.
    """
    request_info.set({"user_id": x_user, "remote_addr": request.client.host if request.client else None})
    return x_user


app = FastAPI(lifespan=lifespan, dependencies=[Depends(current_user)])
Database = Annotated[AsyncSession, Depends(get_session)]


class DocumentIn(BaseModel):
    title: str
    text: str
    version: int | None = None
    reason: str | None = None


class DocumentOut(BaseModel):
    id: int
    title: str
    text: str
    version: int


class Change(BaseModel):
    version: int
    title: str
    text: str
    until: datetime
    change_info: dict[str, Any]


async def find(session: AsyncSession, document_id: int) -> Document:
    document = await session.get(Document, document_id)
    if document is None:
        raise HTTPException(404)
    return document


def shown(document: Document) -> DocumentOut:
    return DocumentOut(id=document.id, title=document.title, text=document.text, version=document.version)


@app.post("/documents", status_code=201)
async def create(data: DocumentIn, session: Database) -> DocumentOut:
    document = Document(title=data.title, text=data.text)
    session.add(document)
    await session.commit()
    return shown(document)


@app.get("/documents/{document_id}")
async def show(document_id: int, session: Database, at: datetime | None = None) -> DocumentOut:
    """Show a document, as it is now or as it was at an instant (with its time zone)."""
    document = await find(session, document_id)
    if at is None:
        return shown(document)
    if at.tzinfo is None:
        raise HTTPException(422, "The instant needs a time zone.")
    state = await document.awaitable_history.version_at(at)
    if state is None:
        raise HTTPException(404, "The document did not exist then.")
    return DocumentOut(id=document.id, title=state.title, text=state.text, version=state.version)


@app.put("/documents/{document_id}")
async def change(document_id: int, data: DocumentIn, session: Database) -> DocumentOut:
    """Change a document; refused if it is not of the version that the client has seen."""
    document = await find(session, document_id)
    if data.version not in (None, document.version):
        raise HTTPException(409, f"Somebody changed the document: it has version {document.version}.")
    document.title, document.text = data.title, data.text
    try:
        with rationale(data.reason) if data.reason else nullcontext():
            await session.commit()
    except StaleVersionError as error:
        raise HTTPException(409, "Somebody changed the document at the same time.") from error
    return shown(document)


@app.get("/documents/{document_id}/history")
async def history(document_id: int, session: Database) -> list[Change]:
    """Tell what the document was, until when, and who ended that."""
    document = await find(session, document_id)
    return [
        Change(version=row.version, title=row.title, text=row.text, until=row.changed, change_info=row.change_info)
        for row in await document.awaitable_history.versions()
    ]

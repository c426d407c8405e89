"""The server's routes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ds_fp6.integrations.mii.sampling import Sampling
from ds_fp6.serving import errors
from ds_fp6.serving.chat import ChatCompletion, render
from ds_fp6.serving.completions import Completion
from ds_fp6.serving.connection import EventStream, while_connected
from ds_fp6.serving.engine import Engine
from ds_fp6.serving.errors import ApiError
from ds_fp6.serving.gate import Gate, Keys
from ds_fp6.serving.generation import Generation, Wanted
from ds_fp6.serving.metrics import Metrics
from ds_fp6.serving.prompts import Prompts
from ds_fp6.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from ds_fp6.serving.settings import Settings


class Server:
    """What the routes share."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        pipeline = engine.pipeline
        self.settings, self.engine, self.metrics = settings, engine, Metrics(engine)
        self.tokenizer = pipeline.tokenizer.tokenizer
        self.prompts = Prompts(self.tokenizer, pipeline.vocab_size, pipeline.max_length)
        self.started = int(time.time())

    def check(self, request: GenerationRequest) -> None:
        """Raises ``ApiError`` 404 for another model, 400 for what is not supported, 503 after a failure."""
        if request.model not in self.settings.served_model_names:
            raise no_such_model(request.model)
        request.check_supported()
        wrong = [token for token in request.logit_bias or {} if not 0 <= token < self.prompts.vocabulary]
        if wrong:
            raise ApiError(400, f"logit_bias names token {wrong[0]}, which the model does not have", "logit_bias")
        self.engine.check()

    def generate(self, request: GenerationRequest, prompts: list[list[int]], limit: int | None, **more) -> Generation:
        wanted = Wanted(
            sampling=Sampling(
                temperature=request.temperature, top_p=request.top_p, top_k=max(0, request.top_k), seed=request.seed,
                presence_penalty=request.presence_penalty, frequency_penalty=request.frequency_penalty,
                logit_bias=request.logit_bias or {},
            ),
            max_new_tokens=self.prompts.new_tokens(prompts, limit, request.n),
            choices=request.n, stops=request.stops, ignore_eos=request.ignore_eos, **more,
        )  # fmt: skip
        try:
            return Generation(self.engine, self.metrics, self.tokenizer, prompts, wanted)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from error

    async def answer(
        self, http: Request, request: GenerationRequest, generation: Generation, answer: Completion | ChatCompletion
    ) -> Response:
        """Whatever ends the answer, no sequence goes on without it."""
        if request.stream:
            return EventStream(answer.chunks(), generation.cancel)
        try:
            return JSONResponse(await while_connected(http.receive, answer.whole()))
        finally:
            generation.cancel()

    def model(self, name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": self.started, "owned_by": "ds_fp6",
            "root": self.settings.model, "max_model_len": self.prompts.max_model_len,
            "quantization_mode": self.settings.quantization_mode,
        }  # fmt: skip


def no_such_model(name: str) -> ApiError:
    return ApiError(404, f"there is no model {name!r}: see /v1/models", "model", "model_not_found")


def create_app(settings: Settings, engine: Engine, on_drained: Callable[[], None] = lambda: None) -> FastAPI:
    """The application. Its lifespan starts the engine; once the server has drained it calls ``on_drained`` and stops
    the engine."""
    server = Server(settings, engine)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        on_drained()
        await engine.stop()

    app = FastAPI(title="ds-fp6 serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(
        Gate, keys=Keys(settings.api_keys), metrics=server.metrics, max_request_bytes=settings.max_request_bytes,
        max_concurrent_requests=settings.max_concurrent_requests,
    )  # fmt: skip

    @app.get("/health")
    async def health() -> Response:
        """200 while tokens can be generated, 503 after a failure."""
        engine.check()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [server.model(name) for name in settings.served_model_names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in settings.served_model_names:
            raise no_such_model(name)
        return JSONResponse(server.model(name))

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        server.check(request)
        prompts = [server.prompts.encode(prompt) for prompt in request.prompts]
        generation = server.generate(
            request, prompts, request.max_tokens, logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
        )  # fmt: skip
        return await server.answer(http, request, generation, Completion(request, prompts, generation))

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: Request) -> Response:
        server.check(request)
        text = render(server.tokenizer, settings.chat_template, request.messages)
        prompts = [server.prompts.encode(text, add_special_tokens=False)]
        generation = server.generate(request, prompts, request.limit, logprobs=request.top)
        return await server.answer(http, request, generation, ChatCompletion(request, generation))

    return app

"""`GET /inference_info` and `/inference_version`: the inference engine around the component."""

from aiohttp import web

from lmcache_api.app import COMPONENT
from lmcache_api.component import Inference
from lmcache_api.operations import attempt
from lmcache_shared import secrets
from lmcache_shared.errors import Failure
from lmcache_shared.responses import json_response, plain

router = web.RouteTableDef()


@router.get("/inference_info")
async def inference_info(request: web.Request) -> web.Response:
    """What vLLM and LMCache tell of themselves, secrets as `***`; `format` is taken and unused, as by LMCache."""
    inference = _inference(request)
    names = request.app[COMPONENT].settings.internal_api_server_env_mask or ()
    info = await attempt(
        request, lambda: secrets.masked_within(plain(inference.info()), extra_names=names), "get inference info"
    )
    return json_response(info, indent=2)


@router.get("/inference_version")
async def inference_version(request: web.Request) -> web.Response:
    """vLLM's version."""
    version = await attempt(request, _inference(request).version, "get inference version")
    return json_response({"vllm_version": version}, indent=2)


def _inference(request: web.Request) -> Inference:
    inference = request.app[COMPONENT].inference
    if inference is None:
        raise Failure(503, "API unavailable", "There is no inference engine around this component.")
    return inference

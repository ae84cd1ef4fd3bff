"""The peers: one module each, all started the same way. `ALL` is the order of the table."""

from benchmarks.peers import envoy, fastapi_aiohttp, lucid, nginx, sanic_hello, sanic_httpx
from benchmarks.peers.base import Peer

ALL: dict[str, Peer] = {
    peer.name: peer
    for peer in (lucid.PEER, nginx.PEER, envoy.PEER, sanic_hello.PEER, fastapi_aiohttp.PEER, sanic_httpx.PEER)
}

"""Peers, one a file, in the order in which tables name them. Each is used where it can be imported."""

from __future__ import annotations

from benchmarks.gpu.contender import Contender
from benchmarks.gpu.peers import cusparselt, deep_gemm, grouped_mm, matmul_ogs, plugged, sonic_moe, vllm

PEERS: tuple[Contender, ...] = (
    grouped_mm.EAGER,
    grouped_mm.INDUCTOR,
    matmul_ogs.PEER,
    deep_gemm.PEER,
    vllm.PEER,
    sonic_moe.PEER,
    cusparselt.PEER,
    plugged.SAMOYEDS,
    plugged.VENOM,
)

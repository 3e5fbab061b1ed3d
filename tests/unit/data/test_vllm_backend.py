"""Cores of an engine of vLLM's on a CPU; what it answers is tested with vLLM itself, in tests/vllm."""

import os

import pytest

from verl_speculator.data.vllm_backend import _all_cores

THREADS = "VLLM_CPU_OMP_THREADS_BIND"


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 1}, raising=False)
    for name in (THREADS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_an_engine_has_all_of_few_cores_while_it_starts():
    with _all_cores():
        assert os.environ[THREADS] == "1,3"
    assert THREADS not in os.environ


@pytest.mark.parametrize("name", [THREADS, "OMP_NUM_THREADS"])
def test_what_the_user_says_of_threads_stands(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    with _all_cores():
        assert os.environ.get(THREADS) == ("1" if name == THREADS else None)
    assert os.environ[name] == "1"


@pytest.mark.parametrize("cores", [{0}, set(range(32))])
def test_one_core_and_many_are_left_to_vllm(cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores, raising=False)
    with _all_cores():
        assert THREADS not in os.environ

"""One finished model of each kind: tiny, random, written by diffusers and read by us."""

import pytest
from cases import FLOWS, KINDS, Case, build_case

from vilex.diffusion import TextToImage


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory) -> Case:
    return build_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> TextToImage:
    return build_case("flux", tmp_path_factory.mktemp("flux")).t2i


@pytest.fixture(scope="module", params=FLOWS)
def flow(request, tmp_path_factory) -> TextToImage:
    return build_case(request.param, tmp_path_factory.mktemp(request.param)).t2i


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> TextToImage:
    return build_case("sd3", tmp_path_factory.mktemp("sd3")).t2i

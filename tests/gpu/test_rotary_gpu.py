"""Tables of cosines and sines in models compiled for a GPU, with the compiler of the torch that is installed there."""

import pytest

from tests.integrations.rotary_code import compiled_code

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_one_kernel_computes_sines():
    """Kernels of one code are printed once: without kept tables one forward and one or two backward print them."""
    codes = compiled_code("cuda")
    assert sum(code.count("math.sin(") for code in codes) == 1
    assert any("kept_table" in code for code in codes)

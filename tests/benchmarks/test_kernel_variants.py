"""Does a first start compile few kernels, and not more for more batch sizes?"""

import json

import pytest

from support.compiling import printed_by

MOST = {"union": 50, "max": 43, "union-set": 53, "max-set": 46, "group": 60, "interval": 60, "top-p": 48}
"""Variants for SGLang's default list of 36 batch sizes; 79 and more before they were reduced."""


def run(*arguments):
    """The lines that the command prints, in a process without Triton's interpreter."""
    return [json.loads(line) for line in printed_by("-m", "benchmarks.kernel_variants", *arguments)]


def test_a_default_start_compiles_few_kernels():
    found = {line["form"]: line["variants"] for line in run("--forms", *MOST)}
    assert found.keys() == MOST.keys()
    assert {form: count for form, count in found.items() if count > MOST[form]} == {}


def test_ranks_compile_little_more():
    (alone,), (of_eight,) = (run("--forms", "union", "--ranks", ranks) for ranks in ("1", "8"))
    assert of_eight["count_listed_kernel"] == 1, "lists are deepened once they are combined"
    assert of_eight["variants"] <= alone["variants"] + 3


@pytest.mark.parametrize("form", ["union", "max-set"])
def test_batch_sizes_of_one_kind_need_no_kernels_of_their_own(form):
    few, many = (run("--forms", form, "--batches", *map(str, sizes)) for sizes in ((17, 64), range(17, 65)))
    assert few[0]["variants"] == many[0]["variants"]

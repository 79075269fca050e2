"""Bytes that a compiled program sends, read from its text."""

from osprey_jax.hlo import collectives

GPU = """HloModule step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather-start = ((bf16[2,3]{1,0}, f32[4]{0}), (bf16[4,3]{1,0}, f32[8]{0})) all-gather-start(%a, %b)
  %reduce-scatter-start = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%c)
  %all-reduce-start = (f32[2]{0}, f32[3]{0}) all-reduce-start(%d, %e)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %compare = pred[] fusion(%i), kind=kLoop, calls=%fused_compare
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_a_started_collective_counts_all_its_results_and_no_operand() -> None:
    found = collectives(GPU)
    assert found["all-gather"].largest == 2 * 12 + 4 * 8
    assert found["reduce-scatter"].largest == 4 * 4
    assert found["all-reduce"].largest == 4 * 5


def test_a_loop_runs_as_often_as_the_compiler_knows() -> None:
    found = collectives(GPU)
    assert found["all-gather"].runs == 5
    assert found["all-gather"].bytes == 5 * 56

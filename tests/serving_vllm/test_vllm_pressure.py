"""Preemption, sampling, beams and repeated requests: every request keeps its own source."""

from __future__ import annotations

from random import Random

import pytest
from vllm_case import answers, cases, checkpoint, engine, greedy

from layalign import LayAlignForCausalLM
from layalign.serving.vllm import compat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint(folder)
    return folder


def preempted(folder):
    """(right answers, all answers, preemptions, steps whose sources came in another order), with little memory."""
    asked = [each for each in cases(folder) if each.length >= 17] * 5
    Random(4).shuffle(asked)
    small = dict(max_model_len=256, max_num_batched_tokens=256, block_size=32, num_gpu_blocks_override=26)
    with engine(folder, **small, disable_log_stats=False) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        run, disorder = runner._execute_mm_encoder, []

        def watched(output):
            order = [runner.input_batch.req_id_to_index[each] for each in output.scheduled_encoder_inputs]
            disorder.append(order != sorted(order))
            return run(output)

        runner._execute_mm_encoder = watched
        found = answers(llm, asked)
        times = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    right = sum(ids == each.answer for ids, each in zip(found, asked, strict=True))
    return right, len(asked), times, sum(disorder)


def test_preempted_requests_keep_their_sources(folder):
    right, count, times, disorder = preempted(folder)
    assert right == count and times > 0 and disorder > 0


def test_without_the_order_they_do_not(tmp_path, monkeypatch):
    """Silently, in a model without soft tokens; with them, a source of another length does not fit its slots."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setattr(compat, "prepare_worker", lambda vllm_config: None)
    patched = GPUModelRunner._batch_mm_inputs_from_scheduler
    monkeypatch.setattr(GPUModelRunner, "_batch_mm_inputs_from_scheduler", getattr(patched, "__wrapped__", patched))
    checkpoint(tmp_path, use_adapter=False)
    right, count, _, disorder = preempted(tmp_path)
    assert right < count and disorder > 0, "vLLM keeps the order by itself now: compat.prepare_worker can go"


def test_sampling_beams_and_repeats(folder):
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    asked = cases(folder)[:6]
    model = LayAlignForCausalLM.from_pretrained(folder)
    with engine(folder) as llm:
        assert answers(llm, asked[:2] * 20) == [each.answer for each in asked[:2] * 20]
        how = SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True)
        first, again = (llm.generate(asked[0].request, how, use_tqdm=False)[0].outputs for _ in range(2))
        assert [each.token_ids for each in first] == [each.token_ids for each in again]
        assert len({tuple(each.token_ids) for each in first}) > 1
        for each in asked:
            beams = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
            best = llm.beam_search([each.request], beams)[0].sequences[0].tokens[-8:]
            assert best == greedy(model, each.source, each.prompt, 8, num_beams=3)

"""vLLM's engine in the process that asks it, as a batch job has it: `offline.py MODEL KV_TRANSFER_CONFIG`.

It says `READY` when it is up, answers a line on its standard input with `TOKENS n` of a completion, and ends with it.
"""

import json
import os
import sys


def main(model: str, kv_transfer_config: str) -> None:
    talk = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer of ours
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        served_model_name="tiny",
        enforce_eager=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=2,
        distributed_executor_backend="mp",  # in one process, vLLM 0.32.0 stumbles over llvmlite, which LMCache loads
        disable_log_stats=False,
        revision=os.environ["REVISION_OF_THE_TESTS"],
        kv_transfer_config=json.loads(kv_transfer_config),
    )
    talk.write("READY\n")
    for line in sys.stdin:
        output = llm.generate(line, SamplingParams(max_tokens=4, ignore_eos=True))
        talk.write(f"TOKENS {len(output[0].outputs[0].token_ids)}\n")
    llm.llm_engine.engine_core.shutdown()
    talk.write("ENDED\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

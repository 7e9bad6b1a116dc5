"""
lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval) with two more models, `graft` and `pair`: the standard
benchmarks, as in the paper. Takes all options of `python -m lmms_eval`:

    pip install lmms-eval==0.7.3            # not in requirements.txt: it brings many packages of its own
    python -m extras.lmms_eval_model --model graft --tasks pope,mme,gqa,mmvet --batch_size 8 \\
        --model_args llm=meta-llama/Llama-3.1-8B-Instruct,encoder=runs/encoder/encoder.safetensors,dtype=bfloat16

model_args: llm (default: the encoder's), encoder, dtype. Questions are put as graft.py puts them. One image a question,
one process.
"""
import re
import sys

import torch
from tqdm import tqdm

from cli import MissingFile, UserError, run_cli
from data.batches import without_image, wrap
from evaluate import Reading, option_ids
from formats import checkpoints, official
from model import VLM
from surrogate import load_surrogate

try:
    from lmms_eval.api.model import lmms
except ImportError:
    lmms = None


class Graft(lmms or object):
    through_surrogate = False

    def __init__(self, llm=None, encoder="assets/encoder.safetensors", dtype="float32",
                 device="cuda" if torch.cuda.is_available() else "cpu", batch_size=8):
        super().__init__()
        llm = llm or checkpoints.open_checkpoint(encoder)[1].get("llm", official.DEFAULT_LLM)
        self.vlm = VLM.from_pretrained(llm, encoder, dtype, device)
        if self.through_surrogate:
            self.vlm.decoder = load_surrogate(self.vlm.decoder, encoder)
        self.batch_size = int(batch_size)

    def ask(self, request):
        """A request -> (token ids of its prompt, its images, what else its task gives: an answer, or options)."""
        context, given, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        images, question = doc_to_visual(doc) or [], without_image(context)
        if len(images) > 1:
            raise UserError(f"task {task} has {len(images)} images in a question: these models read one")
        content = wrap(question) if images else question
        return self.vlm.prompt([{"role": "user", "content": content}]), images, given(doc) if callable(given) else given

    def batches(self, requests):
        """Requests in batches: (their places, prompts, images, what else). A batch has one set of options."""
        groups = {}
        for i, r in enumerate(requests):
            groups.setdefault(repr(r.args[1]) if isinstance(r.args[1], dict) else "", []).append(i)
        with tqdm(total=len(requests), desc=type(self).__name__.lower(), unit="request") as bar:
            for places in groups.values():
                for i in range(0, len(places), self.batch_size):
                    batch = places[i:i + self.batch_size]
                    prompts, images, given = zip(*(self.ask(requests[j]) for j in batch))
                    yield batch, list(prompts), sum(images, []), given
                    bar.update(len(batch))

    def generate_until(self, requests):
        """The answer to each request, a string that ends before the first of its `until`."""
        answers, vlm = [None] * len(requests), self.vlm
        for places, prompts, images, (options, *_) in self.batches(requests):
            if (options.get("num_beams") or 1) > 1:
                raise UserError("num_beams: there is no beam search here, give --gen_kwargs num_beams=1")
            temperature = 0.0 if options.get("do_sample") is False else options.get("temperature") or 0.0
            said = vlm.generate(prompts, images, max_new_tokens=options.get("max_new_tokens") or 128,
                                temperature=temperature, top_p=options.get("top_p") or 1.0)
            until = options.get("until") or []
            ends = "|".join(re.escape(end) for end in ([until] if isinstance(until, str) else until) if end)
            for i, tokens in zip(places, said):
                text = vlm.tokenizer.decode(tokens)
                answers[i] = (re.split(ends, text)[0] if ends else text).strip()
        return answers

    def loglikelihood(self, requests):
        """(-log p, would it be said greedily?) of each request's answer, its end of turn included. lmms-eval's models
        return a loss here, and its multiple choice takes the least."""
        out, vlm = [None] * len(requests), self.vlm
        for places, prompts, images, answers in self.batches(requests):
            ids = option_ids(vlm.tokenizer, [a.strip() for a in answers])
            reading = Reading(*vlm.embed_prompts(prompts, images), vlm.decoder)
            for i, logp, greedy in zip(places, *reading.option_logp([[row] for row in ids])["graft"]):
                out[i] = -logp.item(), greedy.item()
        return out

    def generate_until_multi_round(self, requests):
        raise UserError("a task of several rounds: these models have no adapter for it")


class Pair(Graft):
    through_surrogate = True


def main():
    if lmms is None:
        raise MissingFile("lmms-eval is not installed: pip install lmms-eval==0.7.3")
    from lmms_eval import evaluator
    from lmms_eval.cli.dispatch import main as lmms_eval_main
    from lmms_eval.models import MODEL_REGISTRY_V2, registry_v2
    for cls in (Graft, Pair):
        path = f"extras.lmms_eval_model.{cls.__name__}"
        manifest = registry_v2.ModelManifest(cls.__name__.lower(), simple_class_path=path)
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    # 0.7.3 makes a text of what `loglikelihood` returns, and its own multiple choice then cannot read it
    unwrap = evaluator.unwrap_generation_output
    evaluator.unwrap_generation_output = lambda x: (x, None) if isinstance(x, tuple) and x[1] in (0, 1) else unwrap(x)
    return lmms_eval_main()


if __name__ == "__main__":
    sys.exit(run_cli(main))

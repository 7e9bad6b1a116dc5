import torch, benchmark
from model import Llama
def test_bench(tiny_llm):
    llm=Llama.from_pretrained(tiny_llm); tw=benchmark.transformers_twin(llm)
    t=torch.randint(400,(2,30))
    with torch.no_grad(): print("DIFF",(llm(t)-tw(t).logits).abs().max())
    ids=t[:1]
    a=tw.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=20, max_new_tokens=20)[0,30:].tolist()
    print(a==llm.generate([ids[0].tolist()],max_new_tokens=20)[0])

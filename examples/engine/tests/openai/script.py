"""Every endpoint of kvpush-engine, by the `openai` client. `cargo xtask openai` runs it.

    python script.py PATH-OF-KVPUSH-ENGINE [ARGUMENTS-OF-SERVE...]

Starts the engine, checks, sends SIGTERM in the middle of a stream, and expects the stream to end well and the exit
code to be 0. The first thing that is wrong ends it with a traceback.
"""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai

LIMIT = 300  # seconds for all of it


class Engine:
    def __init__(self, command):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("ready "), f"the engine did not start: {line!r}"
        self.facts = dict(word.split("=", 1) for word in line.split()[1:])
        self.url = "http://" + self.facts["http"]

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def post(self, path, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.headers, json.load(error)

    def metric(self, name):
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name + "{")]
        assert lines, f"{name} is not in /metrics"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def stat(self, name):
        return json.loads(self.get("/server_info"))[name]


def wait_for(what, condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"it did not happen: {what}"
        time.sleep(0.02)


def raises(kind, call, **expected):
    try:
        call()
    except kind as error:
        for name, value in expected.items():
            assert getattr(error, name) == value, (name, getattr(error, name), str(error))
        return error
    raise AssertionError(f"no {kind.__name__}")


MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": [{"type": "text", "text": "Say something."}]},
]


def models(client, model):
    assert [entry.id for entry in client.models.list()] == [model]
    assert client.models.retrieve(model).owned_by == "kvpush-engine"
    raises(openai.NotFoundError, lambda: client.models.retrieve("other"), code="model_not_found")


def completions(client, model):
    ask = dict(model=model, prompt="Once upon a time", max_tokens=8, temperature=0, extra_body={"ignore_eos": True})
    whole = client.completions.create(**ask)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 8
    text = whole.choices[0].text
    assert text

    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])

    # The prompt as tokens, and several prompts.
    tokens = client.post("/tokenize", cast_to=object, body={"prompt": ask["prompt"]}, options={})
    base = {name: value for name, value in ask.items() if name != "prompt"}
    assert client.completions.create(**base, prompt=tokens["tokens"]).choices[0].text == text
    several = client.completions.create(**base, prompt=[ask["prompt"], "Twice"], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == text

    echoed = client.completions.create(**ask, echo=True, logprobs=2)
    assert echoed.choices[0].text == ask["prompt"] + text
    logprobs = echoed.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    assert len(logprobs.tokens) == echoed.usage.total_tokens


def chat(client, model):
    ask = dict(model=model, messages=MESSAGES, max_completion_tokens=10, temperature=0, extra_body={"ignore_eos": True})
    whole = client.chat.completions.create(**ask)
    text = whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant" and text
    assert whole.choices[0].finish_reason == "length"

    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1

    detailed = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    content = detailed.choices[0].logprobs.content
    assert len(content) == 10 and all(len(entry.top_logprobs) == 3 for entry in content)
    # Greedy: what was chosen is the likeliest.
    assert all(abs(entry.logprob - entry.top_logprobs[0].logprob) < 1e-6 for entry in content)

    # Again: most of the prompt is found in the prefix cache.
    long = [{"role": "user", "content": "x" * 200}]
    client.chat.completions.create(model=model, messages=long, max_tokens=1)
    again = client.chat.completions.create(model=model, messages=long, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


def sampling(client, model):
    def text(**options):
        extra = {"ignore_eos": True, **options.pop("extra_body", {})}
        answer = client.completions.create(
            model=model, prompt="A", max_tokens=12, extra_body=extra, **options
        )
        return [choice.text for choice in answer.choices]

    assert text(seed=1) == text(seed=1)
    assert len({text(seed=seed)[0] for seed in range(4)}) > 1
    first, second, third = text(seed=5, n=3)
    assert len({first, second, third}) > 1
    assert text(temperature=0) == text(seed=3, extra_body={"top_k": 1})
    # All but one token are forbidden, so to say.
    token = client.post("/tokenize", cast_to=object, body={"prompt": "z", "add_special_tokens": False}, options={})
    token = token["tokens"][0]
    assert set(text(temperature=0, logit_bias={str(token): 100})[0]) == {"z"}
    assert text(temperature=0, presence_penalty=2, frequency_penalty=2)


def stops(client, model):
    ask = dict(model=model, prompt="Once", temperature=0)
    whole = client.completions.create(**ask, max_tokens=40, extra_body={"ignore_eos": True}).choices[0].text
    stop = whole[10:13]
    expected = whole[: whole.index(stop)]
    stopped = client.completions.create(**ask, max_tokens=40, stop=stop, extra_body={"ignore_eos": True})
    assert stopped.choices[0].text == expected, (stopped.choices[0].text, expected)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 40
    chunks = client.completions.create(**ask, max_tokens=40, stop=[stop], stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    kept = client.completions.create(
        **ask, max_tokens=40, stop=stop, extra_body={"ignore_eos": True, "include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == expected + stop
    late = client.completions.create(
        **ask, max_tokens=40, stop=stop, extra_body={"ignore_eos": True, "min_tokens": 40}
    )
    assert late.usage.completion_tokens == 40


def tokens(client, engine):
    text = "Grüße, 世界!"
    answer = client.post("/tokenize", cast_to=object, body={"prompt": text, "add_special_tokens": False}, options={})
    assert answer["count"] == len(answer["tokens"])
    back = client.post("/detokenize", cast_to=object, body={"tokens": answer["tokens"]}, options={})
    assert back["prompt"] == text
    chat = client.post("/tokenize", cast_to=object, body={"messages": MESSAGES}, options={})
    assert chat["count"] > 10


def errors(client, engine, model):
    ask = dict(model=model, prompt="x")
    create = client.completions.create
    raises(openai.NotFoundError, lambda: create(model="gpt-4", prompt="x"), param="model", status_code=404)
    raises(openai.BadRequestError, lambda: create(**ask, temperature=3), param="temperature")
    raises(openai.BadRequestError, lambda: create(**ask, extra_body={"max_tokens": "many"}), param="max_tokens")
    raises(openai.BadRequestError, lambda: create(**ask, n=0), param="n")
    raises(openai.BadRequestError, lambda: create(model=model, prompt=[]), param="prompt")
    raises(openai.BadRequestError, lambda: create(**ask, max_tokens=10**9), code="context_length_exceeded")
    raises(
        openai.BadRequestError,
        lambda: client.chat.completions.create(model=model, messages=[{"role": "user"}]),
        param="messages[0].content",
    )
    raises(
        openai.BadRequestError,
        lambda: client.chat.completions.create(
            model=model, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        ),
        param="tools",
    )
    for body in [b"", b"{", b"[]", b"\xff"]:
        status, _, answer = engine.post("/v1/completions", body)
        assert status == 400 and answer["error"]["code"] == "invalid_json", (body, answer)
    status, _, answer = engine.post("/v1/completions", b'{"prompt": "' + b"x" * (5 << 20) + b'"}')
    assert status == 413 and answer["error"]["code"] == "request_too_large", answer
    status, _, answer = engine.post("/v1/nothing", {})
    assert status == 404, answer
    status, _, answer = engine.post("/v1/completions", {**ask, "kvpush": {"leg": "prefill"}})
    assert status == 400 and answer["error"]["param"] == "kvpush.ticket", answer
    late = {**ask, "max_tokens": 3000, "ignore_eos": True, "kvpush": {"deadline_ms": 30}}
    status, _, answer = engine.post("/v1/completions", late)
    assert status in (408, 504) and answer["error"]["code"] == "deadline_exceeded", answer
    # Unknown fields are no error.
    assert create(**ask, max_tokens=1, extra_body={"something_new": {"a": 1}})


def aborts(client, engine, model):
    before = engine.metric("kvpush_engine_requests_aborted_total")
    ask = dict(model=model, prompt="x", max_tokens=3000, extra_body={"ignore_eos": True})
    streams = [client.completions.create(**ask, stream=True) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    raises(openai.APITimeoutError, lambda: client.with_options(timeout=0.3, max_retries=0).completions.create(**ask))
    wait_for("aborted", lambda: engine.metric("kvpush_engine_requests_aborted_total") >= before + 5)
    wait_for("nothing runs", lambda: engine.stat("running") == 0 and engine.stat("waiting") == 0)
    assert engine.stat("blocks")["used"] == 0


def parallel(engine, model):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0) as client:
            ask = dict(model=model, max_tokens=6, temperature=0, extra_body={"ignore_eos": True})
            calls = [client.completions.create(prompt=f"number {i % 4}", **ask) for i in range(16)]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    texts = asyncio.run(all_of_them())
    # Whoever else is in the batch does not matter.
    assert all(text == texts[i % 4] for i, text in enumerate(texts))


def operators(engine, model):
    info = json.loads(engine.get("/server_info"))
    assert info["model"] == model and info["role"] == "both" and info["block_size"] == 16
    assert info["blocks"]["total"] > 0 and len(info["model_digest"]) == 64
    assert json.loads(engine.get("/health"))["status"] == "ok"
    assert json.loads(engine.get("/ready"))["status"] == "ready"
    text = engine.get("/metrics")
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_hits_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:time_per_output_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_count",
        "kvpush_engine_steps_total",
        "kvpush_engine_blocks",
    ]:
        assert f"\n{name}{{" in "\n" + text, f"{name} is not in /metrics"
    with urllib.request.urlopen(engine.url + "/kv_events?from=1", timeout=30) as events:
        lines = [events.readline().decode().strip() for _ in range(3)]
    event = json.loads(next(line for line in lines if line.startswith("data:"))[5:])
    assert event["sequence"] == 1 and event["type"] == "stored", lines


def drain(client, engine, model):
    ask = dict(model=model, prompt="x", max_tokens=300, stream=True, extra_body={"ignore_eos": True})
    stream = client.completions.create(**ask)
    next(iter(stream))
    engine.process.send_signal(signal.SIGTERM)
    wait_for("not ready", lambda: refused(engine))
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length", "a stream under way was cut off"
    assert engine.process.wait(timeout=30) == 0


def refused(engine):
    status, headers, answer = engine.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    if status == 200:
        return False
    assert status == 503 and headers["retry-after"] and answer["error"]["code"] == "draining", answer
    return True


def main():
    engine = Engine([sys.argv[1], "serve", "--port", "0", *sys.argv[2:]])

    def give_up():
        print(f"it took more than {LIMIT} s", file=sys.stderr)
        engine.process.kill()

    timer = threading.Timer(LIMIT, give_up)
    timer.daemon = True
    timer.start()
    try:
        model = engine.stat("model")
        client = openai.OpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0, timeout=60)
        # /tokenize is beside /v1, as vLLM has it.
        beside = client.with_options(base_url=engine.url)
        steps = [
            ("models", lambda: models(client, model)),
            ("completions", lambda: completions(Both(client, beside), model)),
            ("chat", lambda: chat(client, model)),
            ("sampling", lambda: sampling(Both(client, beside), model)),
            ("stop strings", lambda: stops(client, model)),
            ("tokens", lambda: tokens(beside, engine)),
            ("errors", lambda: errors(client, engine, model)),
            ("aborts", lambda: aborts(client, engine, model)),
            ("parallel", lambda: parallel(engine, model)),
            ("operators", lambda: operators(engine, model)),
            ("drain", lambda: drain(client, engine, model)),
        ]
        for name, step in steps:
            step()
            print(f"openai client: {name}: ok", flush=True)
    finally:
        if engine.process.poll() is None:
            engine.process.kill()
            engine.process.wait()


class Both:
    """The client, with `post` beside /v1."""

    def __init__(self, client, beside):
        self.completions = client.completions
        self.post = beside.post


if __name__ == "__main__":
    main()

"""Compress a language model to 4 bits, write it as GGUF, serve it, and talk to it with the stock OpenAI client.

    python examples/chat_over_http.py                     a tiny random model: answers are noise
    python examples/chat_over_http.py MODEL [FOLDER]      your own: a Hugging Face folder, a .gguf file, a hub id
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import openai
import tiny

import wherry
from wherry.choose import open_session
from wherry.serve.app import create_app, serving

RECIPE = "gptq:scheme=W4A16_ASYM,group_size=32"


def main(model: str | Path, folder: Path) -> None:
    """Compress, export, serve, ask."""
    wherry.compress(model, folder / "4bit", RECIPE, samples=16, length=128, say=print)
    report = wherry.export(folder / "4bit", folder / "gguf", "gguf")
    print(report.get("bytes").text(), report.get("verdict").value)

    session, artifact, choice = open_session(folder / "gguf")
    print("runs on", choice.get("runtime").value)
    with serving(create_app(session, artifact)) as url:  # the same server that `wherry serve` runs
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none needed")
        question = [{"role": "user", "content": "What is the capital of France?"}]
        stream = client.chat.completions.create(model=artifact.name, messages=question, max_tokens=32, stream=True)
        print("answer: ", end="")
        for piece in stream:
            print(piece.choices[0].delta.content or "" if piece.choices else "", end="", flush=True)
        print()
    session.close()


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else tiny.language_model(),
        Path(sys.argv[2] if len(sys.argv) > 2 else mkdtemp(prefix="chat-")),
    )

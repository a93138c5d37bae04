"""Compress a sentence encoder to int8 ONNX and ask ONNX Runtime how near sentences are, over HTTP.

    python examples/embeddings.py                     a tiny random model
    python examples/embeddings.py MODEL [FOLDER]      your own, such as a folder of all-MiniLM-L6-v2
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import openai
import tiny

import wherry
from wherry.choose import open_session
from wherry.serve.app import create_app, serving

SENTENCES = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The train leaves at nine."]


def main(model: str | Path, folder: Path) -> None:
    """Compress, export, serve, compare."""
    wherry.compress(model, folder / "int8", "rtn:scheme=W8A8_STATIC", samples=16, say=print)
    report = wherry.export(folder / "int8", folder / "onnx", "onnx")
    print(report.get("bytes").text(), report.get("verdict").value)

    session, artifact, _ = open_session(folder / "onnx")
    with serving(create_app(session, artifact)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none needed")
        answer = client.embeddings.create(model=artifact.name, input=SENTENCES)
    session.close()
    vectors = np.array([item.embedding for item in answer.data])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        print(f"{vectors[i] @ vectors[j]:+.3f}  {SENTENCES[i]}  {SENTENCES[j]}")


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else tiny.encoder(),
        Path(sys.argv[2] if len(sys.argv) > 2 else mkdtemp(prefix="embed-")),
    )

// The cosine of two sentences' vectors from /v1/embeddings.
import { show } from "./facts.js";

const $ = (id) => document.getElementById(id);
let facts = null;

show().then((found) => {
  facts = found;
  compare();
}, () => ($("name").textContent = "The server does not answer"));

$("pair").addEventListener("submit", (event) => {
  event.preventDefault();
  compare();
});
for (const field of [$("first"), $("second")]) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("pair").requestSubmit();
  });
}

async function compare() {
  const input = [$("first").value.trim(), $("second").value.trim()];
  if (input.includes("")) return tell("Write both sentences.");
  $("compare").disabled = true;
  const start = performance.now();
  try {
    const answer = await fetch("/v1/embeddings", {
      method: "POST", headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: facts?.model.name, input, encoding_format: "float" }),
    });
    const body = await answer.json();
    if (!answer.ok) return tell(body.error?.message ?? `The server answered ${answer.status}.`);
    const [a, b] = body.data.map((item) => item.embedding);
    const took = Math.round(performance.now() - start);
    display(dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)));
    $("meta").textContent = `Cosine similarity: 1 is the same direction, 0 is unrelated. ${a.length} numbers a sentence, ${took} ms.`;
  } catch {
    tell("The server does not answer. Is it still running?");
  } finally {
    $("compare").disabled = false;
  }
}

function dot(a, b) {
  return a.reduce((sum, x, i) => sum + x * b[i], 0);
}

function display(cosine) {
  $("cosine").textContent = cosine.toFixed(2).replace("-", "\u2212");
  $("bar").style.width = `${Math.max(0, Math.min(1, cosine)) * 100}%`;
}

function tell(text) {
  $("cosine").textContent = "\u2013";
  $("bar").style.width = "0";
  $("meta").textContent = text[0].toUpperCase() + text.slice(1);
}

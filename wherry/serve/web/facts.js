// The facts of the model and its proof, beside the page's work. Text only ever enters the page as text.

const LABELS = {
  bytes: "Weight files", perplexity: "Perplexity", "perplexity ratio": "Perplexity ratio", kl: "KL to the original",
  "top-1 agreement": "Same next token", "same class": "Same likeliest class", spearman: "Spearman",
  "spearman difference": "Spearman, change",
  "embedding agreement": "Cosine with the original", prefill: "Reading speed", decode: "Writing speed",
  sentences: "Speed", "peak memory": "Peak memory", accuracy: "Accuracy", "top-5 accuracy": "Top-5 accuracy",
  "macro f1": "Macro F1", "token f1": "Token F1", map: "mAP", "frame f1": "Frame F1", examples: "Speed", latency: "Latency",
  "relative difference": "Outputs, difference",
};

export function make(tag, text = "", name = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  if (name) node.className = name;
  return node;
}

export function megabytes(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}

function millions(count) {
  return count < 1e6 ? count.toLocaleString("en") : count < 1e9 ? `${(count / 1e6).toFixed(0)} million` : `${(count / 1e9).toFixed(1)} billion`;
}

// Reads the facts, fills header and aside, and returns them. Throws when the server does not answer.
export async function show() {
  const answer = await fetch("/v1/wherry/facts");
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const facts = await answer.json();
  const { model, runtime, proof } = facts;
  const schemes = model.schemes.map((s) => s.scheme);
  document.title = `${model.name} - wherry`;
  document.getElementById("name").textContent = model.name;
  const summary = [schemes[0]?.split(",")[0], model.format, megabytes(model.bytes), `on ${runtime.runtime}`];
  document.getElementById("summary").textContent = summary.filter(Boolean).join(", ");

  const rows = [
    ["Format", model.format],
    ["Size", megabytes(model.bytes)],
    ["Parameters", model.params ? millions(model.params) : ""],
    ["Stored as", model.schemes.map((s) => `${s.scheme.replace(",", ", ")} (${s.tensors} tensor${s.tensors === 1 ? "" : "s"})`).join("; ")],
    ["Recipe", model.recipe],
    ["Context", model.context ? `${model.context.toLocaleString("en")} tokens` : ""],
    ["Labels", model.labels ? model.labels.toLocaleString("en") : ""],
    ["Runtime", [runtime.runtime, runtime.version ?? runtime[runtime.runtime]].filter(Boolean).join(", ")],
    ["Processor", [runtime.isa, runtime.threads && `${runtime.threads} thread${runtime.threads === "1" ? "" : "s"}`].filter(Boolean).join(", ")],
    ["Licence", model.license],
    ["SHA-256", model.sha256.slice(0, 16)],
  ];
  const list = make("dl");
  for (const [term, value] of rows) {
    if (value) list.append(make("dt", term), breakable(value));
  }
  const place = document.getElementById("facts");
  place.replaceChildren(list, proof.rows.length ? table(proof) : make("p", "No proof came with this model: wherry verify measures one.", "small"));
  if (matchMedia("(max-width: 1023px)").matches) document.getElementById("about").open = false;
  return facts;
}

// A value that may break after a comma, and is still copied as it is.
function breakable(value) {
  const out = make("dd");
  for (const part of value.split(/(?<=,)/)) out.append(part, document.createElement("wbr"));
  return out;
}

// Measures as rows, what was measured as columns.
function table(proof) {
  const places = ["original", proof.here].filter((where) => proof.rows.some((row) => row.where === where));
  const out = make("table");
  out.append(make("caption", `Proof${proof.verdict ? `: ${proof.verdict.value}, ${proof.verdict.note}` : ""}`));
  const head = make("tr");
  for (const name of ["Measure", ...places]) {
    const top = make("th", name === proof.here ? "this model" : name);
    top.scope = "col";
    head.append(top);
  }
  out.append(make("thead"));
  out.tHead.append(head);
  const body = make("tbody");
  for (const what of new Set(proof.rows.map((row) => row.what))) {
    const line = make("tr");
    const title = make("th", LABELS[what.toLowerCase()] ?? what);
    title.scope = "row";
    const unit = proof.rows.find((row) => row.what === what).unit;
    if (unit && unit !== "B" && unit !== "%") title.append(make("small", unit));
    line.append(title);
    for (const where of places) line.append(cell(proof.rows.find((row) => row.what === what && row.where === where)));
    body.append(line);
  }
  out.append(body);
  const box = make("div");
  const how = [proof.runtime && `Measured on ${proof.runtime}.`, proof.grade && `Grade: ${proof.grade}.`];
  how.push("In brackets: 95% intervals; for speeds slowest and fastest.");
  box.append(out, make("p", how.filter(Boolean).join(" "), "small"));
  return box;
}

function cell(row) {
  const out = make("td");
  if (!row) return out;
  const [, value, interval] = row.text.match(/^(.*?)(?: (\[.*\]))?$/s);
  const plain = row.unit === "B" ? megabytes(row.value) : row.unit === "%" ? value.replace(" %", "%") : value.replace(` ${row.unit}`, "");
  out.append(make("span", plain));
  if (interval) out.append(make("span", interval, "interval"));
  if (row.note) out.title = row.note;
  return out;
}

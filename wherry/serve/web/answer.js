// One example to /v1/answer: a text, a picture or a sound; its labels with bars, boxes, spans or numbers.
import { make, show } from "./facts.js";

const $ = (id) => document.getElementById(id);
const WORDS = {
  text: "Enter asks, Shift+Enter makes a new line.",
  image: "JPEG, PNG, WebP, GIF, BMP or TIFF. The file goes to this server alone and is not kept.",
  audio: "WAV, FLAC, OGG or MP3. The file goes to this server alone and is not kept.",
};
let model = null;

show().then((facts) => {
  model = facts.model;
  if (model.modality === "arrays") {
    tell(`This model takes arrays by name: POST /v2/models/${model.name}/infer. GET /v2/models/${model.name} names them.`);
    return;
  }
  const text = model.modality === "text";
  $("words").hidden = !text;
  $("files").hidden = text;
  $("send").hidden = false;
  $("hint").textContent = WORDS[model.modality];
  $("what").textContent = model.modality === "image" ? "Picture" : "Sound";
  $("file").accept = `${model.modality}/*`;
  if (text) ask();
}, () => ($("name").textContent = "The server does not answer"));

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("file").addEventListener("change", ask);

async function ask() {
  const text = model.modality === "text", file = $("file").files[0];
  if (text ? !$("text").value.trim() : !file) return tell(text ? "Write a text." : "Choose a file.");
  if (!text && !file.type.startsWith(`${model.modality}/`) && file.type) return tell(`${file.name} is not of the kind ${model.modality}.`);
  $("send").disabled = true;
  const start = performance.now();
  try {
    const answer = await fetch("/v1/answer", {
      method: "POST",
      headers: { "content-type": text ? "application/json" : file.type || "application/octet-stream" },
      body: text ? JSON.stringify({ input: $("text").value.trim() }) : file,
    });
    const body = await answer.json();
    if (!answer.ok) return tell(body.error?.message ?? `The server answered ${answer.status}.`);
    if (!text) look(file);
    display(body.answers[0]);
    $("meta").append(` ${Math.round(performance.now() - start)} ms.`);
  } catch {
    tell("The server does not answer. Is it still running?");
  } finally {
    $("send").disabled = false;
  }
}

// The picture that was sent, as bytes of this page: no address beside the server's own is loaded.
async function look(file) {
  $("shown").replaceChildren();
  if (model.modality !== "image") return;
  const drawn = make("canvas");
  let preview;
  try {
    preview = await createImageBitmap(file);
  } catch {
    return; // a kind that the browser does not draw, TIFF say
  }
  const scale = Math.min(1, 704 / preview.width, 320 / preview.height);
  drawn.width = Math.max(1, preview.width * scale);
  drawn.height = Math.max(1, preview.height * scale);
  drawn.getContext("2d").drawImage(preview, 0, 0, drawn.width, drawn.height);
  $("shown").append(drawn);
}

function display(answer) {
  const rows = [];
  let note = "";
  if (answer.labels) {
    for (const one of answer.labels) rows.push(bar(one.label, one.probability));
    note = `Probabilities: ${answer.probabilities}, the ${answer.labels.length} likeliest labels.`;
  } else if (answer.boxes) {
    for (const one of answer.boxes) rows.push(bar(`${one.label}, ${one.box.map(Math.round).join(", ")}`, one.score));
    note = `${answer.boxes.length} boxes with a score of ${answer.threshold} or more: x0, y0, x1, y1 in pixels.`;
  } else if (answer.speech) {
    for (const one of answer.speech) rows.push(make("li", `${one.start.toFixed(2)} s to ${one.end.toFixed(2)} s`));
    note = answer.speech.length ? "Speech." : `No speech: the highest probability is ${answer.probability.toFixed(2)}.`;
  } else if (answer.text !== undefined) {
    rows.push(make("li", answer.text || "(nothing)", "answer"));
  } else if (answer.words) {
    for (const one of answer.words) rows.push(make("li", `${one.word}: ${one.label}`));
  } else {
    const flat = answer.output ? [answer.output].flat(Infinity) : [answer.score];
    rows.push(make("li", flat.slice(0, 24).map((x) => x.toFixed(4)).join(", ") + (flat.length > 24 ? ", ..." : "")));
    note = `${flat.length} number${flat.length === 1 ? "" : "s"}.`;
  }
  $("labels").replaceChildren(...rows);
  $("meta").textContent = note;
}

function bar(label, share) {
  const row = make("li"), line = make("p", "", "label"), frame = make("div", "", "bar"), filled = make("div");
  line.append(make("span", label), make("span", `${(100 * share).toFixed(1)}%`));
  frame.setAttribute("aria-hidden", "true");
  filled.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  frame.append(filled);
  row.append(line, frame);
  return row;
}

function tell(text) {
  $("labels").replaceChildren();
  $("shown").replaceChildren();
  $("meta").textContent = text;
}

// Streams answers from /v1/chat/completions. Model output enters the page as text, never as markup.
import { make, show } from "./facts.js";

const $ = (id) => document.getElementById(id);
const turns = $("turns"), message = $("message"), speed = $("speed");
const SILENT = "The server does not answer. Is it still running?";
const BROKEN = "The connection broke off, so the answer is not complete. Is the server still running?";
const history = [];
let facts = null;
let running = null;

show().then((found) => {
  facts = found;
  $("welcome").textContent = `Ask ${facts.model.name.replaceAll("-", "\u2011")} something.`;
  $("verdict").textContent = verdict(facts.proof.rows);
  $("temperature").value = facts.defaults.temperature ?? 0.3;
  $("longest").value = facts.defaults.max_tokens;
  $("longest").max = facts.model.context;
}, () => {
  $("name").textContent = "The server does not answer";
  $("welcome").textContent = "Is it still running? Load this page again when it is.";
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  if (running || !text) return;
  message.value = "";
  fit();
  ask(text);
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
message.addEventListener("input", fit);
$("stop").addEventListener("click", stop);
addEventListener("keydown", (event) => event.key === "Escape" && stop());
$("new").addEventListener("click", fresh);

// The proof in one sentence, with its interval.
function verdict(rows) {
  const same = rows.find((row) => row.what === "top-1 agreement" && typeof row.value === "number");
  if (!same) return "";
  const between = same.low == null ? "" : `, between ${same.low.toFixed(1)}% and ${same.high.toFixed(1)}% with 95% confidence`;
  return `Measured: its likeliest next token is the original's ${same.value.toFixed(1)}% of the time${between}.`;
}

function fit() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

function stop() {
  running?.abort();
}

function fresh() {
  stop();
  history.length = 0;
  turns.replaceChildren();
  speed.textContent = "";
  $("new").hidden = true;
  $("start").hidden = false;
  message.focus();
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  if (!on) message.focus({ preventScroll: true });
}

// Keep the end in sight while the reader is at the end.
function follow(change) {
  const page = document.scrollingElement;
  const near = page.scrollHeight - page.scrollTop - page.clientHeight < 96;
  change();
  if (near) page.scrollTop = page.scrollHeight;
}

async function ask(text) {
  const turn = make("section", "", "turn");
  const asked = make("p", text, "asked");
  const answer = make("div", "", "answer");
  asked.prepend(make("span", "You: ", "unseen"));
  answer.setAttribute("aria-live", "polite");
  answer.setAttribute("aria-busy", "true");
  turn.append(asked, answer);
  turns.append(turn);
  $("new").hidden = false;
  $("start").hidden = true;
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;

  const messages = [...history, { role: "user", content: text }];
  const job = (running = new AbortController());
  const clock = { start: performance.now(), first: 0, last: 0, tokens: 0 };
  let written = "", finish = "", problem = null;
  busy(true);
  speed.textContent = "Reading";
  try {
    for await (const part of stream(messages, job.signal)) {
      if (part.error) throw new Failure(part.error);
      const choice = part.choices[0];
      if (choice?.finish_reason) finish = choice.finish_reason;
      if (part.usage) {
        clock.last = performance.now();
        clock.first ||= clock.last;
        clock.tokens = part.usage.completion_tokens;
        clock.zero ??= clock.tokens;
      }
      if (choice?.delta?.content) {
        written += choice.delta.content;
        follow(() => (answer.textContent = written));
        speed.textContent = rate(clock);
      }
    }
    if (!finish) throw new Failure({ message: BROKEN });
  } catch (error) {
    if (job.signal.aborted) finish = "stopped";
    else problem = error instanceof Failure ? error : new Failure({ message: written ? BROKEN : SILENT });
  }
  if (running === job) running = null;
  answer.setAttribute("aria-busy", "false");
  speed.textContent = "";
  if (!turn.isConnected) return busy(Boolean(running));
  busy(false);
  if (problem) return follow(() => turn.append(notice(problem, turn, text)));
  history.push({ role: "user", content: text }, { role: "assistant", content: written });
  follow(() => {
    if (!written) answer.append(make("em", finish === "stopped" ? "Stopped before the first word." : "The model ended without a word."));
    turn.append(summary(clock, finish, written));
  });
}

class Failure extends Error {
  constructor({ message, code }, wait = 0) {
    super(message);
    this.code = code;
    this.wait = wait;
  }
}

// The events of one answer, parsed.
async function* stream(messages, signal) {
  const body = {
    model: facts?.model.name, messages, stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  if ($("longest").value !== "") body.max_tokens = Number($("longest").value);
  const answer = await fetch("/v1/chat/completions", {
    method: "POST", signal, headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  });
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Failure(told?.error ?? { message: `The server answered ${answer.status}.` }, Number(answer.headers.get("retry-after")));
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
    }
  }
}

function rate({ first, last, tokens, zero }) {
  const seconds = (last - first) / 1000;
  return seconds > 0.2 ? `${((tokens - zero) / seconds).toFixed(1)} tokens/s` : "";
}

function summary(clock, finish, text) {
  const out = make("p", "", "meta");
  const first = clock.first ? `first after ${((clock.first - clock.start) / 1000).toFixed(2)} s` : "";
  const ends = { length: "cut at the longest allowed", stopped: "stopped" };
  const said = [`${clock.tokens} token${clock.tokens === 1 ? "" : "s"}`, rate(clock), first, ends[finish]];
  out.append(make("span", said.filter(Boolean).join(", ")));
  if (navigator.clipboard && text) {
    const copy = make("button", "Copy", "quiet");
    copy.type = "button";
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    });
    out.append(copy);
  }
  return out;
}

// What went wrong, and the one thing to do about it.
function notice(problem, turn, text) {
  const long = problem.code === "context_length_exceeded";
  const out = make("div", problem.message[0].toUpperCase() + problem.message.slice(1), "notice");
  out.setAttribute("role", "alert");
  const way = make("button", long ? "New chat" : "Try again", "quiet");
  way.type = "button";
  way.addEventListener("click", () => {
    if (running) return;
    if (long) return fresh();
    turn.remove();
    ask(text);
  });
  out.append(way);
  return out;
}

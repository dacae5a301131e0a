// The server, through the same endpoints that every other client uses.

import { store } from "./store.js";

export class Refused extends Error {}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (store.key) headers.Authorization = `Bearer ${store.key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let reason = `HTTP ${response.status}`;
  try {
    reason = (await response.json()).error.message;
  } catch {
    // a body of another form says less than the status
  }
  throw new Refused(reason);
}

export async function models() {
  return (await (await call("/v1/models")).json()).data;
}

// One answer as it comes: {text} pieces, at last {finish, usage}. A model without a chat template
// continues what the user wrote last.
export async function* answer(model, messages, settings, signal) {
  const chat = Boolean(model.quantkit.chat_template);
  const body = {
    ...settings,
    model: model.id,
    stream: true,
    stream_options: { include_usage: true },
    ...(chat ? { messages } : { prompt: messages.at(-1).content }),
  };
  const response = await call(chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let finish = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Refused(event.error.message);
    const [choice] = event.choices;
    finish = choice?.finish_reason ?? finish;
    const text = (chat ? choice?.delta.content : choice?.text) ?? "";
    if (text) yield { text };
    if (event.usage) yield { finish, usage: event.usage };
  }
}

// Server-sent events: one JSON after "data: " in a line; an event may come in pieces.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line === "data: [DONE]") return;
        if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // an aborted request has nothing left to cancel
  }
}

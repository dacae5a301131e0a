// A conversation with one model.

import { bubble, button, figures, receive, trouble, written } from "./answer.js";
import { element, find } from "./dom.js";
import * as settings from "./settings.js";
import { store } from "./store.js";
import { t } from "./words.js";

const fresh = () => ({ id: crypto.randomUUID(), title: "", messages: [] });

export class Chat {
  constructor(model) {
    this.model = model; // a function: the model that is chosen now
    this.now = fresh();
    this.changed = () => {};
  }

  open(chat) {
    this.now = chat ?? fresh();
    this.draw();
  }

  draw() {
    const all = find("messages");
    all.replaceChildren(...this.now.messages.map((message, i) => this.drawn(message, i)));
    if (!this.now.messages.length) all.append(this.greeting());
    this.follow(true);
  }

  greeting() {
    const name = this.model()?.id ?? "quantkit";
    return element(
      "div",
      { className: "greeting" },
      element("h1", {}, t("empty_title", { model: name })),
      element("p", { className: "faint" }, t("empty_text")),
    );
  }

  drawn(message, index) {
    const mine = message.role === "user";
    const { box, body, foot } = bubble(message.role, mine ? t("you") : (message.model ?? ""));
    if (mine) body.textContent = message.content;
    else written(body, message.content);
    if (!mine) foot.append(element("span", {}, figures(message.stats)), ...this.actions(message, index));
    return box;
  }

  actions(message, index) {
    const copy = button("copy", async () => {
      await navigator.clipboard.writeText(message.content);
      copy.textContent = t("copied");
    });
    const found = navigator.clipboard ? [copy] : []; // browsers give it to https and localhost
    if (index === this.now.messages.length - 1) found.unshift(button("again", () => this.again()));
    return found;
  }

  // The last answer is thrown away and asked for anew.
  again() {
    this.now.messages.pop();
    this.submit?.();
  }

  async ask(text, signal) {
    const chat = this.now; // another one may be opened meanwhile
    if (text) chat.messages.push({ role: "user", content: text });
    chat.title ||= chat.messages[0].content.slice(0, 60);
    store.keep(chat);
    this.draw();
    this.changed();
    const model = this.model();
    const view = bubble("assistant writing", model.id);
    find("messages").append(view.box);
    this.follow(true);
    const draw = (so_far) => {
      written(view.body, so_far);
      this.follow();
    };
    try {
      const { text: content, stats } = await receive(model, this.sent(chat), settings.request(), signal, draw);
      if (content || !signal.aborted) {
        chat.messages.push({ role: "assistant", content, model: model.id, stats });
      }
      store.keep(chat);
      this.changed();
    } catch (error) {
      trouble(error);
    }
    if (chat === this.now) this.draw();
  }

  sent(chat) {
    const messages = chat.messages.map(({ role, content }) => ({ role, content }));
    const system = settings.system();
    return system ? [{ role: "system", content: system }, ...messages] : messages;
  }

  // Stay at the end, unless the reader went up.
  follow(always = false) {
    const main = document.querySelector("main");
    const near = main.scrollHeight - main.scrollTop - main.clientHeight < 120;
    if (always || near) main.scrollTop = main.scrollHeight;
  }
}

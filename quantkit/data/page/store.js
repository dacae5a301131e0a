// What this browser remembers: conversations and settings. The key only until the tab closes.

const CHATS = "quantkit.chats";
const SETTINGS = "quantkit.settings";
const MOST = 100;

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // no storage in this browser, or something else wrote there
  }
}

class Store {
  constructor() {
    const chats = read(CHATS, []);
    this.chats = Array.isArray(chats) ? chats.filter((c) => Array.isArray(c?.messages)) : [];
    const settings = read(SETTINGS, {});
    this.settings = settings && typeof settings === "object" ? settings : {};
    this.dropped = () => {};
  }

  get key() {
    return sessionStorage.getItem("quantkit.key") ?? "";
  }

  set key(value) {
    sessionStorage.setItem("quantkit.key", value.trim());
  }

  set(name, value) {
    this.settings[name] = value;
    localStorage.setItem(SETTINGS, JSON.stringify(this.settings));
  }

  // The conversation, newest first; without messages it is not worth keeping.
  keep(chat) {
    this.chats = [chat, ...this.chats.filter((c) => c.id !== chat.id)].slice(0, MOST);
    this.save();
  }

  remove(id) {
    this.chats = this.chats.filter((chat) => chat.id !== id);
    this.save();
  }

  save() {
    for (;;) {
      try {
        localStorage.setItem(CHATS, JSON.stringify(this.chats));
        return;
      } catch (error) {
        if (error.name !== "QuotaExceededError" || this.chats.length < 2) throw error;
        this.chats.pop();
        this.dropped();
      }
    }
  }
}

export const store = new Store();

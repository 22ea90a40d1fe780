// The labels that the server has not confirmed yet, in the order in which they were made, and undo.

import { post } from "/assets/server.js";

export class Orders {
  // `done(state)` is called with the server's state after each change, `failed(error)` if a request fails, and
  // `announce(text)` for screen readers.
  constructor({ done, failed, announce }) {
    Object.assign(this, { done, failed, announce });
    this.pending = []; // {id, labels, excluded, said, refused}
    this.sending = null; // a promise while they are on their way
    this.undoing = false;
    this.last = null; // the numbers of the labels that an undo is about, from the server
  }

  // Adds an order, or puts it in the place of `before` if that could not be saved. Returns it. Its `said` is announced
  // when it is saved. `refused()` is called if it cannot be saved.
  put(order, before = null) {
    const at = this.sending ? -1 : this.pending.indexOf(before);
    // The server saves an order that is sent again only once, because the answer may have been lost.
    const put = { excluded: [], refused: () => {}, ...order, id: at >= 0 ? before.id : crypto.randomUUID() };
    if (at >= 0) this.pending[at] = put;
    else this.pending.push(put);
    return put;
  }

  // Returns the ids of the patches whose label is not saved yet.
  patches() { return new Set(this.pending.flatMap(({ labels }) => labels.map(({ patch }) => patch))); }

  // Returns whether no order is left to save.
  send() {
    this.sending ??= this.sendAll().finally(() => {
      this.sending = null;
    });
    return this.sending;
  }

  // Sends one order after the other. If one cannot be saved, it and those behind it wait for the next call.
  async sendAll() {
    while (this.pending.length) {
      const [{ id, labels, excluded, said, refused }] = this.pending;
      try {
        const state = await post("/labels", { order: id, labels, excluded });
        this.pending.shift();
        this.done(state);
        if (!this.pending.length) this.announce(said);
      } catch (error) {
        refused();
        const count = this.pending.reduce((sum, one) => sum + one.labels.length, 0);
        // An order can exclude patches without a label.
        const lost = count ? ` Labels not saved: ${count}. They are lost if you close or reload this page.` : "";
        this.failed(new Error(`${error.message}${lost}`));
        return false;
      }
    }
    return true;
  }

  // Undoes the last label, which may still be on its way. Returns whether the server has answered.
  async undo() {
    if (this.undoing) return false;
    this.undoing = true;
    try {
      if (!(await this.send())) return false;
      const state = await post("/undo", { last: this.last });
      this.done(state);
      this.announce(state.undone.length ? "Undone" : "Nothing to undo");
      return true;
    } catch (error) {
      this.failed(error);
      return false;
    } finally {
      this.undoing = false;
    }
  }
}

// The labels that the server has not confirmed yet, in the order in which they were made, and undo.

import { post } from "/assets/server.js";

const AGAIN_MS = 3000; // until orders are sent again to a server that does not answer

export class Orders {
  // `done(state)` is called with the server's state after each change, `failed(error)` if a request fails,
  // `announce(text)` for screen readers, and `working(text)` with what is on its way.
  constructor({ done, failed, announce, working }) {
    Object.assign(this, { done, failed, announce, working });
    this.pending = []; // {id, labels, excluded, said, refused, settled}
    this.sending = null; // a promise while they are on their way
    this.later = 0; // a timer while they wait to be sent again
    this.undoing = false;
    this.last = null; // the numbers of the labels that an undo is about, from the server
    this.session = null; // the server refuses orders for another folder or annotator
  }

  // Adds an order, or puts it in the place of `before` if that could not be saved. Returns it. Its `said` is announced
  // when it is saved. If the server refuses it, `refused()` is called. `settled` becomes whether it is saved: false if it,
  // or an order before it, is refused.
  put(order, before = null) {
    const at = this.sending ? -1 : this.pending.indexOf(before);
    // The server saves an order that is sent again only once, because the answer may have been lost.
    const { id, sent } = at >= 0 ? before : { id: crypto.randomUUID(), sent: false };
    const put = { excluded: [], refused: () => {}, ...order, id, sent };
    put.settled = new Promise((settle) => { put.settle = settle; });
    if (at >= 0) this.pending[at] = put;
    else this.pending.push(put);
    return put;
  }

  // Returns the ids of the patches whose label is not saved yet.
  patches() { return new Set(this.pending.flatMap(({ labels }) => labels.map(({ patch }) => patch))); }

  // Returns the number of labels that are not saved yet.
  get count() { return this.pending.reduce((sum, { labels }) => sum + labels.length, 0); }

  // Returns whether no order is left to save.
  send() {
    clearTimeout(this.later);
    this.showWork();
    this.sending ??= this.sendAll().finally(() => {
      this.sending = null;
    });
    return this.sending;
  }

  showWork() { if (this.pending.length) this.working(this.count ? `Saving ${this.count}…` : "Saving…"); }

  // Sends one order after the other. If one cannot be saved, it and those behind it wait for the next call, which comes by
  // itself if the server does not answer.
  async sendAll() {
    while (this.pending.length) {
      const [order] = this.pending;
      const { id, labels, excluded, sent } = order;
      order.sent = true;
      try {
        const state = await post("/labels", { session: this.session, order: id, labels, excluded, again: sent });
        this.pending.shift();
        order.settle(true);
        this.showWork();
        this.done(state);
        if (!this.pending.length) this.announce(order.said);
      } catch (error) {
        this.fail(order, error);
        return false;
      }
    }
    return true;
  }

  fail(order, error) {
    if (error.passing) this.later = setTimeout(() => this.send(), AGAIN_MS);
    else {
      order.refused();
      // The orders behind this one are not sent either until the user acts.
      for (const one of this.pending) one.settle(false);
    }
    const then = error.passing ? "This page sends them again automatically. They are lost if you close or reload it."
      : "They are lost if you close or reload this page.";
    // An order can exclude patches without a label.
    const lost = this.count ? ` Labels not saved: ${this.count}. ${then}` : "";
    this.failed(new Error(`${error.message}${lost}`));
  }

  // Undoes the last label, which may still be on its way. Returns whether the server has answered.
  async undo() {
    if (this.undoing) return false;
    this.undoing = true;
    try {
      if (!(await this.send())) return false;
      this.working("Undoing…");
      const state = await post("/undo", { session: this.session, last: this.last });
      this.working("");
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

// Shows the slide a second time without layers, beside the first view. Both views move together.

import { Stage } from "./stage.js";

const byId = (id) => document.getElementById(id);

export class Compare {
  constructor(stage, facts) {
    Object.assign(this, { stage, facts });
    this.bare = null; // the stage without layers
    this.leader = stage; // the stage that the other one follows
    byId("compare-on").addEventListener("change", (event) => this.turn(event.target.checked));
    this.lead(stage);
    // Whatever happens outside of the second view moves the first one.
    for (const kind of ["pointerdown", "wheel", "keydown", "hashchange"]) {
      window.addEventListener(kind, (event) => this.choose(event), { capture: true, passive: true });
    }
  }

  get on() { return !byId("bare").hidden; }

  turn(on = !this.on) {
    byId("compare-on").checked = on;
    byId("bare").hidden = !on;
    byId("views").classList.toggle("split", on);
    if (!on) return;
    this.bare ??= this.opened();
    this.leader = this.stage;
    this.follow();
  }

  opened() {
    const bare = new Stage(byId("bare"), this.facts, false);
    bare.overviewShown = this.stage.overviewShown;
    bare.osd.addOnceHandler("open", () => {
      bare.osd.canvas.setAttribute("role", "img");
      bare.osd.canvas.setAttribute("aria-label", "The same part of the slide without layers");
      this.follow();
    });
    this.lead(bare);
    this.markPointer(this.stage, bare);
    this.markPointer(bare, this.stage);
    return bare;
  }

  lead(stage) {
    stage.osd.addHandler("viewport-change", () => { if (this.leader === stage) this.follow(); });
  }

  choose(event) {
    const inside = event.type !== "keydown" && event.target instanceof Node && byId("bare").contains(event.target);
    const leader = inside ? this.bare : this.stage;
    if (leader === this.leader) return;
    this.leader = leader;
    this.follow(); // the other one may still be moving
  }

  follow() {
    const follower = this.leader === this.stage ? this.bare : this.stage;
    if (this.on && follower?.osd.isOpen()) follower.goTo(this.leader.view(), true);
  }

  // Marks the place of the pointer over one view in the other.
  markPointer(from, to) {
    const mark = document.createElement("div");
    mark.className = "mark";
    mark.hidden = true;
    to.element.append(mark);
    from.osd.canvas.addEventListener("pointermove", (event) => {
      const [left, top] = from.positionOf(event);
      mark.hidden = event.pointerType === "touch";
      mark.style.transform = `translate(${left}px, ${top}px)`;
    });
    from.osd.canvas.addEventListener("pointerleave", () => { mark.hidden = true; });
  }

  showOverview(share) { this.bare?.showOverview(share); }
}

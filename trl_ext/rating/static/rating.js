// Keys for every control, and rankings that are dragged or moved. Without this file the forms work all the same.
"use strict";
document.documentElement.classList.add("scripted");

// The token of the link is kept in a cookie by now: out of the address bar, where it would be seen and shared.
if (location.search) history.replaceState(null, "", location.pathname);

const comment = document.getElementById("comment");
let sent = false;
addEventListener("pageshow", () => { sent = false; });
addEventListener("submit", (event) => {
  if (sent) event.preventDefault(); // a key that was pressed twice
  sent = true;
});

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
  if (event.target.matches("textarea, input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const key = event.key.toUpperCase();
  if (ranking && ranking.key(event, key)) return; // letters are its answers' first
  if (key === "M" && comment) {
    event.preventDefault();
    comment.focus();
    return;
  }
  const control = document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (control) {
    event.preventDefault();
    control.click();
  }
});

class Ranking {
  constructor(list) {
    this.list = list;
    this.said = document.getElementById("said");
    for (const item of this.items) {
      item.querySelector(".up").addEventListener("click", (event) => this.move(item, -1, event.currentTarget));
      item.querySelector(".down").addEventListener("click", (event) => this.move(item, +1, event.currentTarget));
      item.querySelector(".tie").addEventListener("click", () => this.tie(item));
      item.querySelector(".handle").addEventListener("pointerdown", (event) => this.drag(item, event));
    }
    this.number();
  }

  get items() { return [...this.list.children]; }

  // Places 1, 2, ...; what is tied with the one above it has the same.
  number() {
    let place = 0;
    const items = this.items;
    items.forEach((item, index) => {
      const tied = item.classList.contains("tied");
      if (!tied) place += 1;
      item.querySelector("select").value = String(place);
      item.querySelector(".number").textContent = `${place}`;
      item.querySelector(".up").disabled = index === 0;
      item.querySelector(".down").disabled = index === items.length - 1;
      item.querySelector(".tie").disabled = index === 0;
      item.querySelector(".tie").setAttribute("aria-pressed", String(tied));
    });
  }

  tell(item) {
    const place = item.querySelector(".number").textContent;
    const tied = item.classList.contains("tied") ? ", tied with the answer above" : "";
    this.said.textContent = `Answer ${item.dataset.letter} has place ${place}${tied}.`;
  }

  // What it leaves stays tied without it; what it comes to lie among takes it in.
  shift(item, change) {
    const isTied = (one) => one !== null && one.classList.contains("tied");
    if (!isTied(item) && isTied(item.nextElementSibling)) item.nextElementSibling.classList.remove("tied");
    item.classList.remove("tied");
    change();
    item.classList.toggle("tied", isTied(item.nextElementSibling));
    this.number();
  }

  move(item, step, button) {
    const items = this.items;
    const other = items[items.indexOf(item) + step];
    if (!other) return;
    this.shift(item, () => (step < 0 ? item.after(other) : item.before(other)));
    this.tell(item);
    (button && !button.disabled ? button : item).focus();
    item.scrollIntoView({ block: "nearest" });
  }

  tie(item) {
    if (item === this.list.firstElementChild) return;
    item.classList.toggle("tied");
    this.number();
    this.tell(item);
  }

  drag(item, event) {
    event.preventDefault();
    const handle = event.currentTarget;
    handle.setPointerCapture(event.pointerId);
    item.classList.add("moving");
    const follow = (moved) => {
      const middle = (other) => { const box = other.getBoundingClientRect(); return box.top + box.height / 2; };
      const place = this.items.indexOf(item);
      const passedUp = this.items.slice(0, place).filter((other) => moved.clientY < middle(other)).reverse();
      const passedDown = this.items.slice(place + 1).filter((other) => moved.clientY > middle(other));
      // The others move and the one under the pointer stays: taken out of the page, it would lose the pointer.
      if (passedUp.length + passedDown.length === 0) return;
      this.shift(item, () => {
        passedUp.forEach((other) => item.after(other));
        passedDown.forEach((other) => item.before(other));
      });
    };
    const drop = () => {
      handle.removeEventListener("pointermove", follow);
      item.classList.remove("moving");
      this.tell(item);
      item.focus({ preventScroll: true });
    };
    handle.addEventListener("pointermove", follow);
    handle.addEventListener("lostpointercapture", drop, { once: true });
  }

  // Letters choose an answer, arrows go on to the next, with Shift they move it, T ties it with the one above.
  key(event, key) {
    const items = this.items;
    const item = document.activeElement.closest(".ranking li");
    const lettered = items.find((one) => one.dataset.letter === key);
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (step && item) {
      if (event.shiftKey) this.move(item, step);
      else (items[items.indexOf(item) + step] ?? item).focus();
    } else if (key === "T" && item) this.tie(item);
    else if (event.key === "Enter" && !event.target.matches("button, a")) document.querySelector("button.main").click();
    else if (lettered) lettered.focus();
    else return false;
    event.preventDefault();
    return true;
  }
}
const list = document.querySelector(".ranking");
const ranking = list ? new Ranking(list) : null;

// Browsers start no workers for pages that are read from disk. There the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      this.ready = new Promise((resolve) => {
        const { contentWindow, contentDocument } = this.frame;
        contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        const script = contentDocument.createElement("script");
        script.src = url;
        script.onload = resolve;
        contentDocument.head.append(script);
      });
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}

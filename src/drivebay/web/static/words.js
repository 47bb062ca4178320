// What the page says, in the browser's language.

const WORDS = {
  en: {
    connecting: "Connecting …",
    shown: "Connected",
    ended: "The VM has ended or restarts. Trying again …",
    gone: "'drivebay vm screen' does not answer. Trying again …",
    refused: "This link does not open the screen: it was used already, or is older than five " +
      "minutes. Press Enter where 'drivebay vm screen' runs, and open the new link.",
    again: ". Trying again …",
    keys: "Ctrl+Alt+Del",
    full: "Full screen",
    screen: "Screen of the VM",
    help: "The screen takes all keys; press and let go Ctrl+Alt+Shift to leave it.",
  },
  zh: {
    connecting: "正在连接……",
    shown: "已连接",
    ended: "虚拟机已关闭或正在重启，正在重试……",
    gone: "“drivebay vm screen”没有响应，正在重试……",
    refused: "此链接无法打开屏幕：它已被使用，或已超过五分钟。" +
      "请在运行“drivebay vm screen”的终端按回车键，然后打开新链接。",
    again: "。正在重试……",
    keys: "Ctrl+Alt+Del",
    full: "全屏",
    screen: "虚拟机屏幕",
    help: "屏幕会接收所有按键；按下并松开 Ctrl+Alt+Shift 可离开屏幕。",
  },
};

export const language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
export const words = WORDS[language];

package qupath.fx.dialogs

class Dialogs {
    static String answer
    static Collection asked
    static def showChoiceDialog(String title, String text, Collection choices, Object first) {
        asked = choices
        return answer
    }
}

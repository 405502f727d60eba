// This room makes the forms of /admin: fields with their labels and help, the
// input kept and the mistake beside its field when a form is refused. What a
// field may hold is not decided here: the handlers of /manage say, and a field
// has the name that they use for it.
package main

import (
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"
)

// A pageForm is what template "form" shows.
type pageForm struct {
	Action, Submit, Cancel string
	Danger                 bool
	Problem                string // with the form as a whole
	Version                int64  // of what it changes; 0: nothing
	Once                   string // names this copy of the form: it is carried out once
	Hidden                 []option
	Fields                 []*field
}

// A field is one input with its label. Kind is text, password, number, textarea,
// select, checkbox, datetime-local, or heading for a line between fields.
type field struct {
	Name, Label, Kind, Value, Help, Placeholder, Error string
	Options                                            []option
	Required, Checked, Short                           bool
}

type option struct{ Value, Label string }

// fieldID is what labels and help refer to a field by.
func fieldID(name string) string {
	return "f-" + strings.NewReplacer(".", "-", "[", "-", "]", "").Replace(name)
}

// fill puts in the values: those that were sent, or else those that are stored.
// Passwords never come back.
func (f *pageForm) fill(sent, stored url.Values) {
	values := stored
	if sent != nil {
		values = sent
	}
	for _, in := range f.Fields {
		switch in.Kind {
		case "heading", "password":
		case "checkbox":
			in.Checked = values.Get(in.Name) != ""
		default:
			in.Value = strings.ReplaceAll(values.Get(in.Name), "\r\n", "\n")
		}
	}
}

// refused puts a mistake beside the field that it is about, and returns the
// status of the answer. What is no mistake of the sender's comes back as error.
func (f *pageForm) refused(err error) (int, error) {
	if errors.Is(err, errTaken) {
		err = &fieldError{"name", "is taken by another one"}
	}
	if errors.Is(err, errStale) {
		f.Problem = "Somebody changed this while you had the form open. Open it again to see the change; what you typed is still here."
		return http.StatusConflict, nil
	}
	fe, ok := errors.AsType[*fieldError](err)
	if !ok {
		if e, ok := errors.AsType[*apiError](err); ok && e.status == http.StatusBadRequest {
			f.Problem = e.msg
			return http.StatusBadRequest, nil
		}
		return 0, err
	}
	for _, in := range f.Fields {
		if in.Name == fe.param || strings.HasPrefix(fe.param, in.Name+"[") { // an entry of a list
			in.Error = in.Label + " " + strings.TrimSuffix(fe.msg, ".") + "."
			return http.StatusBadRequest, nil
		}
	}
	f.Problem = capital(sentence(fe))
	return http.StatusBadRequest, nil
}

func capital(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(r)) + s[n:]
}

// setText puts a form's text into the fields of a request. An empty one is left
// out, or null where that means "none".
func setText(to map[string]any, form url.Values, name string, emptyIsNull bool) {
	switch v := form.Get(name); {
	case v != "":
		to[name] = v
	case emptyIsNull:
		to[name] = nil
	}
}

// setNumber is setText for whole numbers. What is none goes on as text: the
// handler then says what the field must be.
func setNumber(to map[string]any, form url.Values, name string, emptyIsNull bool) {
	setText(to, form, name, emptyIsNull)
	if v, ok := to[name].(string); ok {
		if n, err := strconv.ParseInt(strings.ReplaceAll(strings.TrimSpace(v), ",", ""), 10, 64); err == nil {
			to[name] = n
		}
	}
}

// splitLines returns the lines of a text area, without empty ones.
func splitLines(text string) []string {
	out := []string{}
	for line := range strings.SplitSeq(text, "\n") {
		if line = strings.TrimSpace(line); line != "" {
			out = append(out, line)
		}
	}
	return out
}

// sentForms remembers which forms were carried out of late, so that one which
// shows a secret once does not make another when its answer is reloaded. It
// forgets the oldest.
type sentForms struct {
	mu    sync.Mutex
	names [512]string
	next  int
}

// first reports whether a form is seen for the first time.
func (s *sentForms) first(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.names {
		if n == name {
			return false
		}
	}
	s.names[s.next] = name
	s.next = (s.next + 1) % len(s.names)
	return true
}

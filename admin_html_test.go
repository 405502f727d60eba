// A small strict reader of HTML for the tests of /admin: tags must be balanced,
// attributes quoted, ids unique, fields labelled, and nothing may be inline that
// could be a script.
package main

import (
	"fmt"
	"html"
	"slices"
	"strings"
)

// An htmlTag is an opening tag.
type htmlTag struct {
	name   string
	attrs  map[string]string
	within []string // names of the open tags around it
}

// readHTML returns the opening tags of a page and its text, or what is wrong.
func readHTML(page string) (tags []htmlTag, text string, err error) {
	void := []string{"meta", "link", "input", "img", "br", "hr", "col", "rect", "path", "line", "circle", "polyline", "polygon"}
	var open []string
	var b strings.Builder
	for rest := page; rest != ""; {
		i := strings.IndexByte(rest, '<')
		if i < 0 {
			b.WriteString(rest)
			break
		}
		b.WriteString(rest[:i])
		rest = rest[i:]
		switch {
		case strings.HasPrefix(rest, "<!DOCTYPE html>"):
			rest = rest[len("<!DOCTYPE html>"):]
		case strings.HasPrefix(rest, "</"):
			name, after, ok := strings.Cut(rest[2:], ">")
			if !ok || len(open) == 0 || open[len(open)-1] != name {
				return tags, "", fmt.Errorf("</%s> closes %v", clip(name, 40), open)
			}
			open, rest = open[:len(open)-1], after
			b.WriteByte(' ')
		default:
			tag, closed, after, err := readTag(rest)
			if err != nil {
				return tags, "", err
			}
			tag.within = slices.Clone(open)
			tags = append(tags, tag)
			if !slices.Contains(void, tag.name) && !closed {
				open = append(open, tag.name)
			}
			if tag.name == "script" && !strings.HasPrefix(after, "</script>") || tag.name == "style" {
				return tags, "", fmt.Errorf("inline %s", tag.name)
			}
			rest = after
		}
	}
	if len(open) > 0 {
		return tags, "", fmt.Errorf("still open: %v", open)
	}
	return tags, html.UnescapeString(b.String()), nil
}

// readTag reads one opening tag: only names, and values in double quotes.
func readTag(rest string) (tag htmlTag, closed bool, after string, err error) {
	word := func(s string) int {
		n := 0
		for n < len(s) && (s[n] >= 'a' && s[n] <= 'z' || s[n] >= 'A' && s[n] <= 'Z' || s[n] >= '0' && s[n] <= '9' || s[n] == '-' || s[n] == ':') {
			n++
		}
		return n
	}
	s := rest[1:]
	n := word(s)
	if n == 0 {
		return tag, false, "", fmt.Errorf("a tag without a name: %q", clip(rest, 60))
	}
	tag = htmlTag{name: s[:n], attrs: map[string]string{}}
	for s = s[n:]; ; {
		s = strings.TrimLeft(s, " \n")
		switch {
		case strings.HasPrefix(s, "/>"):
			return tag, true, s[2:], nil
		case strings.HasPrefix(s, ">"):
			return tag, false, s[1:], nil
		}
		n := word(s)
		if n == 0 {
			return tag, false, "", fmt.Errorf("in <%s>: %q", tag.name, clip(s, 60))
		}
		name, value := s[:n], ""
		s = s[n:]
		if strings.HasPrefix(s, "=") {
			v, more, ok := strings.Cut(strings.TrimPrefix(s, `="`), `"`)
			if !ok || !strings.HasPrefix(s, `="`) {
				return tag, false, "", fmt.Errorf("in <%s %s: not quoted", tag.name, name)
			}
			value, s = html.UnescapeString(v), more
		}
		if _, twice := tag.attrs[name]; twice {
			return tag, false, "", fmt.Errorf("in <%s>: %s twice", tag.name, name)
		}
		tag.attrs[name] = value
	}
}

// checkHTML returns what is wrong with a page.
func checkHTML(page string) (problems []string) {
	tags, _, err := readHTML(page)
	if err != nil {
		return []string{err.Error()}
	}
	known := strings.Fields(`html head meta title link script body a header img nav ul li div span form button main p h1 h2 h3 section table thead tbody tr th td
		caption time code dl dt dd input select option label textarea strong br pre fieldset legend svg rect path line circle polyline polygon g text desc details summary ol small abbr figure figcaption tspan tfoot optgroup em colgroup col`)
	complain := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	ids, labelled := map[string]bool{}, map[string]bool{}
	for _, t := range tags {
		if id, ok := t.attrs["id"]; ok {
			if ids[id] || id == "" || strings.ContainsAny(id, " \"<>") {
				complain("the id %q is there twice, or is none", id)
			}
			ids[id] = true
		}
		if t.name == "label" {
			labelled[t.attrs["for"]] = true
		}
	}
	for _, t := range tags {
		if !slices.Contains(known, t.name) {
			complain("<%s> is not one of ours", t.name)
		}
		for name, value := range t.attrs {
			if strings.HasPrefix(name, "on") || name == "style" || name == "srcdoc" {
				complain("<%s> has %s", t.name, name)
			}
			if (name == "href" || name == "src" || name == "action" || name == "formaction") && !strings.HasPrefix(value, "/admin/") && !strings.HasPrefix(value, "#") {
				complain("<%s %s=%q> leads elsewhere", t.name, name, value)
			}
			if name == "for" || name == "aria-describedby" || name == "aria-labelledby" || name == "data-copy" {
				for id := range strings.FieldsSeq(value) {
					if !ids[id] {
						complain("<%s %s=%q> names nothing", t.name, name, id)
					}
				}
			}
		}
		switch t.name {
		case "input", "select", "textarea":
			if t.attrs["type"] != "hidden" && !labelled[t.attrs["id"]] && t.attrs["aria-label"] == "" {
				complain("<%s name=%q> has no label", t.name, t.attrs["name"])
			}
		case "form":
			if slices.Contains(t.within, "form") || t.attrs["method"] == "" || t.attrs["action"] == "" {
				complain("a form within a form, or without method or action")
			}
		case "button":
			if t.attrs["type"] == "" {
				complain("a button without a type")
			}
		case "img":
			if _, ok := t.attrs["alt"]; !ok {
				complain("an image without alt")
			}
		}
	}
	return problems
}

// links returns the places that a page leads to with GET, and the actions of
// forms that post.
func links(page string) (gets, posts []string) {
	tags, _, _ := readHTML(page)
	for _, t := range tags {
		switch {
		case t.name == "a" && strings.HasPrefix(t.attrs["href"], "/"):
			gets = append(gets, t.attrs["href"])
		case t.name == "form" && t.attrs["method"] == "get":
			gets = append(gets, t.attrs["action"])
		case t.name == "form":
			posts = append(posts, t.attrs["action"])
		}
	}
	return gets, posts
}

// The pages of /admin about projects. What they show and change goes through the
// handlers of /manage.
package main

// A projectsView is the list of projects.
type projectsView struct {
	Projects []projectView
	Name     string // what the list is searched by
	Active   string
	Next     string // the address of the next page, "" if there is none
	First    bool   // there is no project at all
}

func (s *server) projectsPage(r *pageRequest) (*page, error) {
	v := projectsView{Name: r.query.Get("name"), Active: r.query.Get("active")}
	rep, err := s.listProjects(r.asking("limit", "100", "name", v.Name, "active", v.Active, "after", r.query.Get("after")))
	if err != nil {
		return nil, err
	}
	l := rep.body.(list[projectView])
	v.Projects = l.Data
	v.Next = r.nextPage(l.Next)
	v.First = len(l.Data) == 0 && v.Name == "" && v.Active == "" && r.query.Get("after") == ""
	return &page{template: "projects", title: "Projects", data: v}, nil
}

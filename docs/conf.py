"Sphinx's configuration of the site. scripts/make_site.sh runs it over what scripts/site_stage.py has written."
import os
import re
import sys
from configparser import ConfigParser
from dataclasses import is_dataclass
from pathlib import Path

from fastcore.docments import docments

docs = Path(__file__).resolve().parent
sys.path.insert(0, str(docs.parent))
parser = ConfigParser(delimiters=['='])
parser.read(docs.parent / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

project, author, version = cfg['lib_name'], cfg['author'], cfg['version']
language = 'en'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.mathjax', 'sphinx_copybutton']
nitpicky = True                                                # a link to a name of ours that is nowhere is an error
nitpick_ignore_regex = [('py:.*', r'(?!miniai\.).*'), ('py:class', r'miniai\.\w+\._.*')]
suppress_warnings = ['myst.header']

nb_execution_mode = 'off'
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = 'Show the checks', 'Hide the checks'
myst_enable_extensions = ['dollarmath']
myst_dmath_double_inline = True
myst_heading_anchors = 3

autodoc_default_options = {'members': True, 'undoc-members': True, 'member-order': 'bysource', 'show-inheritance': True}
autodoc_preserve_defaults = True
autodoc_typehints = 'signature'
python_maximum_signature_line_length = 80
add_module_names = False

html_theme = 'furo'
pygments_dark_style = 'github-dark'
html_title = project
html_static_path = ['_static', os.environ['MINIAI_MATHJAX']]   # the second is the folder of tex-svg.js
html_css_files = ['site.css']
mathjax_path = 'tex-svg.js'
html_copy_source = html_show_sourcelink = False
html_show_copyright = False
html_last_updated_fmt = None
copybutton_exclude = '.linenos, .gp, .go'


def rst(docstring):
    "A docstring of ours as reStructuredText: what stands in backticks is code, and no other sign has a meaning"
    parts = re.split(r'`([^`]+)`', docstring)
    return ''.join(f'``{s}``' if i % 2 else re.sub(r'([*|_\\])', r'\\\1', s) for i, s in enumerate(parts))


def document(app, what, name, obj, options, lines):
    "Docments (the comments beside arguments) become lists of arguments; a link leads to where a name is built"
    lines[:] = rst('\n'.join(lines)).split('\n')
    if what in ('class', 'exception', 'function', 'method') and not is_dataclass(obj): # its __init__ has no source
        found = docments(obj.__init__ if isinstance(obj, type) else obj, full=True)
        said = {k: rst(v['docment'].replace('\n', ' ')) for k, v in found.items() if k != 'self' and v['docment']}
        lines += ['', *(f':param {k}: {s}' for k, s in said.items() if k != 'return')]
        if 'return' in said: lines.append(f':returns: {said["return"]}')
    parts = name.split('.')
    if what != 'module' and len(parts) == 3: lines += ['', f':ref:`Where this is built <built-{parts[1]}-{parts[2]}>`', '']


def setup(app): app.connect('autodoc-process-docstring', document)
